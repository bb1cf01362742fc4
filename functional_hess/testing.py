"""Laws that derivatives must keep, as functions a user can call on functions of their own."""

__all__ = []
