"""What Python's tools say of some small corpora: the fixture of `tests/scores.rs`.

    pip install sacrebleu==2.6.0 nltk==3.10.4 pycocoevalcap==1.2 && python -B scores.py ../data

The text is made up here, from a grammar of sentences about restaurants and from single cases: empty lines, one word, no
match, repeated words, stems. All lines are tokenized already; words are what a space separates.

BLEU is sacreBLEU's, METEOR nltk's with Snowball's stems and a WordNet without synonyms, ROUGE-L and CIDEr those of coco-caption
(pycocoevalcap). For NIST there is the formula below, for any number of references as mteval-v13a has it; where there is one
reference and some n-gram of every order, it must equal nltk's, which takes one reference for each order otherwise.
"""

import json
import math
import random
import sys
from collections import Counter
from pathlib import Path

import nltk
import sacrebleu
from nltk.stem.snowball import SnowballStemmer
from nltk.translate.meteor_score import meteor_score
from nltk.translate.nist_score import corpus_nist
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

NAMES = ["the Copper Kettle", "Harbour View", "the Old Mill", "Nonna 's Table", "Zest"]
FOODS = ["Italian", "Thai", "seafood", "vegetarian", "home cooking"]
PLACES = ["by the river", "near the station", "in the old town", "next to the cinema", "in the harbour"]
PRICES = ["cheap", "moderately priced", "expensive", "very cheap"]
SHAPES = [
    "{n} serves {p} {f} food {l} .",
    "{n} is a {p} restaurant {l} , serving {f} dishes .",
    "For {f} food there is {n} {l} . It is {p} .",
    "Located {l} , {n} serves {f} dishes . The prices are {p} .",
    "{n} , {l} , serves {p} {f} food and families are welcome .",
    "If you like {f} , try {n} ; it is {l} and {p} .",
]


def sentence(rng, facts):
    return rng.choice(SHAPES).format(**facts)


def damaged(rng, words):
    """The words with some of them left out, doubled, moved or in another form."""
    out = []
    for w in words:
        kind = rng.random()
        if kind < 0.08:
            continue
        out.append(w)
        if kind > 0.94:
            out.append(w)
        elif kind > 0.90 and len(out) > 1:
            out[-1], out[-2] = out[-2], out[-1]
        elif kind > 0.86:
            out[-1] = {"serves": "serving", "dishes": "dish", "prices": "priced", "is": "was"}.get(w, w.upper())
    return out


def made(seed, segments, most):
    rng = random.Random(seed)
    out = []
    for _ in range(segments):
        facts = {"n": rng.choice(NAMES), "f": rng.choice(FOODS), "l": rng.choice(PLACES), "p": rng.choice(PRICES)}
        references = [sentence(rng, facts) for _ in range(rng.randint(1, most))]
        out.append((" ".join(damaged(rng, sentence(rng, facts).split())), references))
    return out


SINGLE = {
    "the same": [("a b c d e f", ["a b c d e f"]), ("g h i j k", ["g h i j k"])],
    "nothing in common": [("x y z u v w", ["a b c d e f", "g h"]), ("p q r s t", ["k l m n o"])],
    "an empty hypothesis": [("", ["a b c d e f"]), ("a b c d e", ["a b c d e", "b c d e f g"])],
    "only an empty hypothesis": [("", ["a b c"])],
    "one word": [("Zest", ["Zest", "Zest is cheap ."])],
    "words of one letter": [("a", ["a"]), ("b", ["c"])],
    "repeated words": [("the the the the the the the", ["the cat is on the mat", "there is a cat on the mat"])],
    "repeated references": [("food food cheap", ["cheap food food food", "cheap food food food"]), ("the end of it", ["the end"])],
    "lengths as far": [("a b c d e", ["a b c d e f g", "a b c", "x y"]), ("k l m n o p", ["k l m n o p q"])],
    "stems": [("families served dishes quickly nearby", ["family serving dish quick near", "the families serve quickly"]),
              ("Generously PRICED meals are happily eaten", ["generous prices and a happy eater", "priced generously , meals ate"])],
    "stems with apostrophes": [("Nonna 's table isn't cheap ' ''", ["nonna's tables are cheaper ' s"])],
    "curly apostrophes": [("the chef’s brothers’ meals", ["a chef's brother meal", "the chef dines"])],
    "accents": [("Le café Ünal sert des crêpes 字 字", ["le Café ünal sert des CRÊPES 字", "un café à crêpes"])],
}


class NoSynonyms:
    """A WordNet that knows no words."""

    def synsets(self, _):
        return []


def ngrams(words, n):
    return Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))


def nist(segments, most=5):
    """Doddington (2002), as mteval-v13a: clipped by the largest count of all references, mean length of references."""
    counts = Counter()
    for _, references in segments:
        for r in references:
            counts[()] += len(r)
            for n in range(1, most + 1):
                counts.update(ngrams(r, n))
    score = 0.0
    for n in range(1, most + 1):
        told, total = 0.0, 0
        for hypothesis, references in segments:
            largest = Counter()
            for r in references:
                largest |= ngrams(r, n)
            for gram, count in (ngrams(hypothesis, n) & largest).items():
                told += count * math.log2(counts[gram[:-1]] / counts[gram])
            total += max(len(hypothesis) - n + 1, 0)
        score += told / max(total, 1)
    ratio = sum(len(h) for h, _ in segments) / sum(sum(map(len, rs)) / len(rs) for _, rs in segments)
    if ratio >= 1:
        return score
    return score * math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(ratio) ** 2) if ratio > 0 else 0.0


def scores(corpus):
    hypotheses = [h for h, _ in corpus]
    references = [rs for _, rs in corpus]
    words = [(h.split(), [r.split() for r in rs]) for h, rs in corpus]
    # sacreBLEU wants the i-th references of all segments; None where a segment has fewer.
    streams = [[rs[i] if i < len(rs) else None for rs in references] for i in range(max(map(len, references)))]
    stemmer, wordnet = SnowballStemmer("english"), NoSynonyms()
    numbered = lambda lines: dict(enumerate(lines))
    found = nist(words)
    if all(len(rs) == 1 for rs in references) and any(len(h) >= 5 for h, _ in words):
        assert math.isclose(found, corpus_nist([rs for _, rs in words], [h for h, _ in words]), rel_tol=1e-12, abs_tol=1e-12)
    return {
        "bleu": sacrebleu.corpus_bleu(hypotheses, streams, tokenize="none", force=True).score,
        "nist": found,
        "meteor": sum(meteor_score(rs, h, stemmer=stemmer, wordnet=wordnet) for h, rs in words) / len(words),
        "rouge_l": float(Rouge().compute_score(numbered(references), numbered([[h] for h in hypotheses]))[0]),
        "cider": float(Cider().compute_score(numbered(references), numbered([[h] for h in hypotheses]))[0]),
    }


def main(folder):
    corpora = dict(SINGLE)
    for seed, (segments, most) in enumerate([(1, 1), (3, 1), (8, 1), (2, 4), (5, 2), (12, 6), (20, 8), (30, 3)]):
        corpora[f"restaurants {seed}"] = made(seed, segments, most)
    out = []
    for name, corpus in corpora.items():
        segments = [{"hypothesis": h, "references": rs} for h, rs in corpus]
        out.append({"name": name, "scores": scores(corpus), "segments": segments})
        print(name, out[-1]["scores"])
    made_with = {"sacrebleu": sacrebleu.__version__, "nltk": nltk.__version__, "pycocoevalcap": "1.2"}
    text = json.dumps({"made_with": made_with, "corpora": out}, indent=1, ensure_ascii=False)
    (Path(folder) / "scores.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
