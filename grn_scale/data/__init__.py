"""Media, token shards and their index, and the plan that turns them into packs."""
