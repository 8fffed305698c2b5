"""Other systems that train with parameter servers. Each needs an extra of the package, such as ``paramserver[ray]``."""
