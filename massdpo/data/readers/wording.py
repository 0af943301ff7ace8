"""What the parts of a preference are called, and the notes on what became of rows."""

# the usual names of each part's column, the most usual first
NAMES = {
    "prompt": ("prompt", "question", "instruction", "query", "conversations", "messages", "input", "problem", "post"),
    "context": ("input",),
    "system": ("system", "system_prompt"),
    "chosen": ("chosen", "chosen_response", "preferred_output", "response_j", "accepted", "preferred", "best"),
    "rejected": (
        *("rejected", "rejected_responses", "rejected_response", "rejecteds", "non_preferred_output", "response_k"),
        *("dispreferred", "worse"),
    ),
    "answers": ("answers", "completions", "responses", "outputs", "generations"),
    "scores": ("scores", "ratings", "rewards"),
    "ranks": ("ranks", "ranking"),
    "candidates": ("candidates",),
    "id": ("id",),
}
TEXT_KEYS = ("text", "response", "answer", "content", "output", "completion", "generated_text", "value")
NUMBER_KEYS = {"scores": ("score", "overall_score", "rating", "reward"), "ranks": ("rank",)}
SEVERAL = ("rejected", "answers", "scores", "ranks")  # these may stand in numbered columns: rejected_1, rejected_2
ALIGNED = ("answers", "scores", "ranks")  # the number in one column belongs to the answer in another
NEEDED = ("prompt", "chosen", "rejected")

# notes on rows that were changed or left out
NOTES = {
    "texts_stripped": "spaces at the ends of {} texts were removed (dataset.strip)",
    "numbers_as_text": "{} numbers were read as texts",
    "roles_renamed": "{} messages with the role developer were read as system",
    "tool_calls_dropped": "the tool calls of {} messages were left out",
    "inputs_beside_messages_ignored": "the input of {} rows was ignored: their prompts are messages",
    "rejected_repeats_dropped": "{} rejected responses that repeat another of their row were dropped",
    "rows_with_several_chosen": "{} rows have several chosen responses: one example for each (dataset.several_chosen)",
    "rows_ranked_by_order": "the answers of {} rows have no scores: the first was taken as the best",
    "answers_without_text_or_score": "{} answers without a text or a score were left out",
    "tied_answers_dropped": "{} answers as good as the best were left out (dataset.ties)",
    "answers_within_margin_dropped": "{} answers nearly as good as the best were left out (dataset.min_margin)",
    "rows_without_a_worse_answer": "{} rows in which no answer is worse than the best were left out",
}
