"""The HTTP application: routes of OpenAI and of the original, and what guards them."""
