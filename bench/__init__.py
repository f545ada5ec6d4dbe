"""Benchmarks: `headrace bench NAME [--json]` runs `bench.NAME.run`. Not tests: they measure, and judge nothing."""
