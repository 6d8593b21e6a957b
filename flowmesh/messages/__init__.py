"""What is exchanged with peers (`wire`), task documents (`output`) and children (`job`)."""
