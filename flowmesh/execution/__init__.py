"""Carries tasks out: from a message on Redis to the event that ends it. The only place where the parts meet."""
