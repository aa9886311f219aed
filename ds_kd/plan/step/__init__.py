"""Plan the exchange between ranks and the time of one optimizer step."""
