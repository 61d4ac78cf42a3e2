"""A network for a hospital and a server: the export of both sides, and the modules of which they consist."""

from fhe_mlp.deployment.export import check_new, export_network
