"""The normal form `Edit`, the `Site` it acts on, and the protocols of layers and storages."""
