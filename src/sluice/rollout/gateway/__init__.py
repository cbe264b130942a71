"""The gateway: one HTTP server with OpenAI's and Anthropic's routes over recorded sessions."""
