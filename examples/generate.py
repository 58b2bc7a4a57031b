"""Open a checkpoint and stream a text: python examples/generate.py moebius-demo/model "The import statement" """

import sys

from moebius import AutoModelForCausalLM, AutoTokenizer, TextStreamer


def main(path: str, prompt: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    print(model.plan, file=sys.stderr)
    inputs = tokenizer(prompt, return_tensors="pt")
    streamer = TextStreamer(tokenizer)
    model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=0.7, seed=0, streamer=streamer)


if __name__ == "__main__":
    main(*sys.argv[1:])
