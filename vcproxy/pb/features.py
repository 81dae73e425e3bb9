"""Features that peers name in Hello and Welcome: what may be said to each other beyond what the first version said."""

SHARDS = "shards"
"""Hello: this agent knows of brains that share tenants, and takes their contents from all of them."""
CONTENT = "content"
"""Hello: of tenants' contents only is to be spoken on this stream. Welcome: such streams are understood."""
SHARDED = "sharded"
"""Welcome: this brain has a part of the tenants."""
