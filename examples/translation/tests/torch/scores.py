"""What sacreBLEU says of some translations: for the test `scores_are_those_of_sacrebleu`.

The sentences were written for this purpose: punctuation, numbers, quotes, no-break spaces,
entities, empty lines.

    pip install sacrebleu==2.6.0 && python scores.py ../data
"""

import json
import sys
from pathlib import Path

import sacrebleu

PAIRS = [
    ("Le chat dort sur le canapé.", "Le chat dort sur le canapé."),
    ("Le chien court dans le jardin vert.", "Le chien court dans le grand jardin vert."),
    ("Il a mangé 3,5 pommes - pas 4 !", "Il a mangé 3,5 pommes, pas 4 !"),
    ("Attendez\u00a0! Où allez-vous\u00a0?", "Attends\u202f! Où vas-tu\u202f?"),
    ("«\u00a0Oui\u00a0», dit-elle.", "« Oui », a-t-elle dit."),
    ("L'eau d'aujourd'hui n'est pas l'eau d'hier.", "L’eau d’aujourd’hui n’est pas celle d’hier."),
    ("Le prix est de 1.000,50 € (taxes comprises).",
     "Le prix est de 1 000,50 € (toutes taxes comprises)."),
    ("Une e-mail de 10-12 lignes", "Un e-mail de 10-12 lignes..."),
    ("A &amp; B &quot;cité&quot; &lt;b&gt;", "A & B \"cité\" <b>"),
    ("", "Rien n'a été traduit."),
    ("Une phrase de trop.", ""),
    ("deux cent quatre-vingt-un mille trois cents", "deux cent quatre-vingt-un mille trois cents"),
    ("Deux hommes jouent de la guitare devant un grand public",
     "Deux hommes jouent de la guitare devant une grande foule."),
    ("oui oui oui oui oui", "oui, oui"),
    ("x", "y"),
    ("Voir http://exemple.fr/a?b=c&d=e, p.12.", "Voir http://exemple.fr/a?b=c&d=e, page 12."),
    ("50% des gens... pensent-ils @ça#?", "50 % des gens… pensent cela ?"),
    ("字 漢字 🌍 !", "漢字 字 🌍!"),
    ("  espaces   multiples  ", "espaces multiples"),
    ("a{b}c[d]e`f^g_h~i|j\\k", "a { b } c [ d ] e ` f ^ g _ h ~ i | j \\ k"),
]


def main(folder):
    hypotheses, references = zip(*PAIRS)
    n = len(PAIRS)
    parts = [(0, n), (0, 5), (5, 10), (10, 15), (14, 15), (9, 10), (10, 11)]
    parts += [(i, i + 2) for i in range(0, n - 1, 2)]
    out = []
    for a, b in parts:
        h, r = list(hypotheses[a:b]), [list(references[a:b])]
        bleu, chrf = sacrebleu.corpus_bleu(h, r).score, sacrebleu.corpus_chrf(h, r).score
        out.append({"from": a, "to": b, "bleu": bleu, "chrf": chrf})
    folder = Path(folder)
    (folder / "scores.hypotheses.txt").write_text("\n".join(hypotheses))
    (folder / "scores.references.txt").write_text("\n".join(references))
    text = json.dumps({"sacrebleu": sacrebleu.__version__, "parts": out}, indent=1)
    (folder / "scores.json").write_text(text + "\n")
    for part in out:
        print(part)


if __name__ == "__main__":
    main(sys.argv[1])
