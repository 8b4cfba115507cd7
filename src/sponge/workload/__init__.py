"""Networks, payloads and arrivals, turned into requests with deadlines."""
