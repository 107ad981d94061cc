"""`opdlm sweep`: models x tasks x decoding settings, and the tables and figures made of them."""
