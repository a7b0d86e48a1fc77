"""Task files for lm-evaluation-harness that read items on this machine: `lm_eval --include_path` takes this folder."""
