"""What every part of a strategy needs: contexts, values per replica, nested structures, devices."""
