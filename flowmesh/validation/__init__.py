"""Checks decoded documents against structs, with errors that name field and remedy."""
