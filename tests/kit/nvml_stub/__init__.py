"""A stub of the driver's library, scripted from a file, so that tests run the real binding without a GPU."""
