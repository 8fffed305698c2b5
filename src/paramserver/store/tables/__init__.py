"""Tables of a store: rows that are pulled and pushed one by one."""
