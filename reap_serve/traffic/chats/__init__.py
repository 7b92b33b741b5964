"""Messages, tools and bodies of other APIs as those of the OpenAI chat API."""
