"""hyperseaport: a service registry and TCP proxy over secure p2p."""

__version__ = "0.1.0"
