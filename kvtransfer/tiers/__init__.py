"""The tiers behind the workers' own caches: a host pool in memory, and segment files on disk behind it.

One store process per node. Workers push sealed blocks into it and fetch them back with the very frames that they
send each other; the store keeps payloads as they came, encoded, and never decodes one: nothing here knows torch.
docs/tiers.md says how it behaves; server.py puts it together.
"""
