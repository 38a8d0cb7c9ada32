"""Supervises vLLM CPU workers and serves them as one OpenAI-compatible API."""

__version__ = "0.1.0"
