"""What users plug in: packages of their own, as small as can be."""
