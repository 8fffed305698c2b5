"""Variables of a program's own."""
