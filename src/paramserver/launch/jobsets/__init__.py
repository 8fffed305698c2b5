"""``paramserver launch --manifest``: a JobSet on this machine, with the environment and the policies of JobSet."""
