"""Adapters by which other libraries compute with these operators; importing one changes nothing."""
