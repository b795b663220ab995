"""Guards of an outer run: what is refused or warned of before it spoils a run."""
