"""The plugin inside vLLM itself, on this CPU: what ``tools/in_vllm.py`` runs, each part in a process of its own."""
