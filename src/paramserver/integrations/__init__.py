"""Other systems that train with parameter servers. Each needs an extra of this package, such as ``paramserver[ray]``."""
