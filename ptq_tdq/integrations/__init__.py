"""Where other libraries let this one in; each file is imported by who wants it."""
