"""Results of a preflight, and the configuration of a small run to look at."""

NAMES = ("node1", "node2", "node3")


def states(results):
    """Check -> state."""
    return {result.check: result.state for result in results}


def named(results, check):
    """The one result of a check."""
    (result,) = (result for result in results if result.check == check)
    return result


def write_settings(folder, more=""):
    """Path of folder/config.yaml, of a run that reads folder/tokens and writes folder/run."""
    config = folder / "config.yaml"
    config.write_text(f"output: {folder}/run\nmodel: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 64}}\n"
                      f"data: {{dataset: {folder}/tokens}}\n{more}")
    return config
