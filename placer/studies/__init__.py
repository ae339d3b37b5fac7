"""Questions that take solving to answer: headroom, price of a stale plan, how much to profile."""
