"""Chats: prompts to tokens with a checkpoint's own template, and answers back to text."""
