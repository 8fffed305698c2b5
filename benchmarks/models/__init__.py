"""The models that are measured. Importing this package alone imports no training library."""
