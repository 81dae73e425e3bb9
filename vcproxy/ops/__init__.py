"""What brain and node share to be operated: configuration files, logs, metrics, the admin socket, certificates."""
