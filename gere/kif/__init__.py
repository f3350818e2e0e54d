"""Recurrent-KIF and TaSL: fuse a task with the earlier ones of a sequence, entry by entry of the adapter."""
