"""Worlds of conversations: a scripted other side, who answers what the agent says. No torch.

- `replay`: what a conversation was, from the turns of the agent
- `bookings`: requests of which half lack a fact, and a person who gives it when asked
- `calculator`: sums of which some can be done by heart, and a tool for the others
- `dealer`: a car dealer who comes down to a reserve price by a rule
- `things`: 256 things, and an oracle that says what of an attribute is left
"""
