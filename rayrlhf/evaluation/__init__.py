"""What a model is worth: numbers from scores and human judgements, without a model or an actor."""
