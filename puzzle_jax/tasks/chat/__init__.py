"""Chats: from prompts to tokens with a checkpoint's own template, and back."""
