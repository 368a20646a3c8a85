"""Dialogue models, and in time their long-term memory (Xu, Szlam and Weston, ACL 2022)."""
