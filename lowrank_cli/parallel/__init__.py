"""Several processes that train one model: how they meet, what they hold, and what they tell each other."""
