"""The engine of dspark-agent: models, KV, sampling, grammars and the loop that decodes them."""
