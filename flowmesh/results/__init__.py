"""A task's folder, and how what lies in it reaches its destination."""
