"""Programs from raw clips to token shards: manifest, tokenize, index, verify. They may use all of grn_scale."""
