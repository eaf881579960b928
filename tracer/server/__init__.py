"""Reading captures over HTTP, under `/tensorspan/`: by vLLM's own server, or by `tensorspan view`."""
