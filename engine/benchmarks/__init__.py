"""Open-ended benchmarks: questions, answers, and a judge behind a chat endpoint."""
