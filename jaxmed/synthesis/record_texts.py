"""Records as sentences: the same facts in other words, read back from any of them, and with a factor left out.

Every field of a record has ten or more templates; a rendering draws one for each field. What a template says is read
back by the template itself, so that no rendering changes a fact. The patients are fictitious and the sentences ours.

Source: MUPM's code re-renders records and questions from templates, thirty times a person, to vary the text without its
content. Deviations: BMI is weight / height^2; in the release an operator's precedence makes it the weight. Findings in
free words, and questions about the present, are ours.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from jaxmed.errors import InputError, listed

TEMPLATES: dict[str, tuple[str, ...]] = {
    "person": (
        "The patient is a {age}-year-old {sex}.",
        "This is a {sex} of {age} years.",
        "A {sex} aged {age} years is examined.",
        "We see a {sex} who is {age} years old.",
        "Age {age} years, {sex}.",
        "Sex: {sex}. Age: {age} years.",
        "The record is that of a {sex}, {age} years of age.",
        "A {age}-year-old {sex} comes to the clinic.",
        "The person scanned, a {sex}, has an age of {age} years.",
        "At the time of the scan this {sex} is {age} years old.",
    ),
    "bmi": (
        "The body mass index is {bmi} kg/m2.",
        "BMI: {bmi} kg/m2.",
        "A body mass index of {bmi} kg/m2 was found.",
        "Weight relative to height gives a BMI of {bmi} kg/m2.",
        "The BMI amounts to {bmi} kg/m2.",
        "Measured body mass index, {bmi} kg/m2.",
        "With {bmi} kg/m2 as body mass index.",
        "Height and weight correspond to {bmi} kg/m2.",
        "The index of body mass stands at {bmi} kg/m2.",
        "On the scales and by the tape: BMI {bmi} kg/m2.",
    ),
    "pressure": (
        "Blood pressure is {systolic}/{diastolic} mmHg with a pulse of {pulse} per minute.",
        "The pulse is {pulse} per minute and the blood pressure {systolic}/{diastolic} mmHg.",
        "RR {systolic}/{diastolic} mmHg, pulse {pulse} per minute.",
        "Pulse: {pulse} per minute. Pressure: {systolic}/{diastolic} mmHg.",
        "At rest the heart beats {pulse} times a minute at a pressure of {systolic}/{diastolic} mmHg.",
        "A blood pressure of {systolic}/{diastolic} mmHg and {pulse} beats per minute were measured.",
        "The cuff reads {systolic}/{diastolic} mmHg; {pulse} beats per minute are counted.",
        "Systolic {systolic}, diastolic {diastolic} mmHg, heart rate {pulse} per minute.",
        "The heart rate is {pulse} per minute; the pressure is {systolic} over {diastolic} mmHg.",
        "Measured at rest: {systolic} over {diastolic} mmHg, {pulse} beats per minute.",
    ),
    "symptoms": (
        "Symptoms reported: {symptoms}.",
        "The complaint is: {symptoms}.",
        "Asked for symptoms, the answer is: {symptoms}.",
        "What is felt: {symptoms}.",
        "At present there is the following to report: {symptoms}.",
        "Complaints at the visit: {symptoms}.",
        "The reason for the visit is given as: {symptoms}.",
        "In their own words: {symptoms}.",
        "Current symptoms are: {symptoms}.",
        "The interview brought up: {symptoms}.",
    ),
    "history": (
        "Known heart disease: {history}.",
        "The cardiac history reads: {history}.",
        "Earlier diagnoses of the heart: {history}.",
        "In the past there was: {history}.",
        "Previous cardiac conditions: {history}.",
        "From the files, on the heart: {history}.",
        "History of the heart and its vessels: {history}.",
        "Before this scan the heart's record was: {history}.",
        "Cardiac history: {history}.",
        "What is known of the heart so far: {history}.",
    ),
    "habits": (
        "Smoking: {smoking}. Alcohol: {alcohol}.",
        "Alcohol: {alcohol}. Tobacco: {smoking}.",
        "As to tobacco, {smoking}; as to alcohol, {alcohol}.",
        "Habits: tobacco {smoking}, alcohol {alcohol}.",
        "Asked about smoking: {smoking}; about drinking: {alcohol}.",
        "Use of alcohol: {alcohol}. Use of tobacco: {smoking}.",
        "The answer on smoking is {smoking}, that on alcohol {alcohol}.",
        "Cigarettes: {smoking}. Drinks: {alcohol}.",
        "Tobacco is noted as {smoking} and alcohol as {alcohol}.",
        "Lifestyle: smoking {smoking}; drinking {alcohol}.",
    ),
    "findings": (
        "Findings: {findings}.",
        "Measured or seen: {findings}.",
        "The report states: {findings}.",
        "Noted by the examiner: {findings}.",
        "On examination there was: {findings}.",
        "The results read: {findings}.",
        "What the tests gave: {findings}.",
        "Results at hand: {findings}.",
        "In the findings it says: {findings}.",
        "Further findings are: {findings}.",
    ),
}
QUESTIONS = (
    "Which of these conditions will be diagnosed within the next {years} years?",
    "Within the next {years} years, which diagnosis is to be expected?",
    "Which option is most likely over the next {years} years?",
    "What will be found in this person during the next {years} years?",
    "Looking ahead over the next {years} years, which of the following applies?",
    "Select the condition most probable in the next {years} years.",
    "Name the disease that is likely to appear in the next {years} years.",
    "Considering image and record, what should be expected in the next {years} years?",
    "Of the following, what is the likeliest finding of the next {years} years?",
    "Taking all into account, which condition lies ahead in the next {years} years?",
)
LEADS = (
    "{question}",
    "Considering image and record: {question}",
    "Please answer the following. {question}",
    "Look at the image and read the record. {question}",
    "Here is what is asked: {question}",
    "With both image and record in mind: {question}",
    "The question about this case is: {question}",
    "Going by image and words alone: {question}",
    "Judge the case as a whole. {question}",
    "Give the likeliest option. {question}",
)
FACTS = (
    "age", "sex", "bmi", "systolic", "diastolic", "pulse", "symptoms", "history", "smoking", "alcohol", "findings",
)  # fmt: skip
NAME = re.compile(r"\{(\w+)\}")
HORIZON = re.compile(r"(\d+(?:\.\d+)?)\s*-?\s*years?\b", re.IGNORECASE)
# A fact is what it says up to the punctuation that a template sets behind it.
FACT = r"[^.;,:]+(?:\.\d+)?"


def body_mass_index(weight: float, height: float) -> float:
    """Return kg/m2 from a weight in kg and a height in m."""
    return weight / height**2


def facts_of(row: Mapping[str, str]) -> dict[str, str]:
    """Return the facts of a row; BMI from weight and height where it is not given.

    Raises:
        InputError: Weight and height are no such numbers.
    """
    facts = {name: row[name] for name in FACTS if row.get(name)}
    if "bmi" not in facts and row.get("weight") and row.get("height"):
        try:
            index = body_mass_index(float(row["weight"]), float(row["height"]))
        except (ValueError, ZeroDivisionError) as error:
            found = f"{row['weight']} and {row['height']}"
            raise InputError("weight, height", "kg and m", found) from error
        if not 5 < index < 200:
            raise InputError("weight, height", "kg and m", f"{row['weight']} and {row['height']}", "is it in cm?")
        facts["bmi"] = f"{index:.1f}"
    return facts


def facts_said(facts: Mapping[str, str]) -> dict[str, str]:
    """Return the facts that some sentence holds: a field with an unknown fact has none."""
    said = known_fields(facts)
    names = {name for field in said for name in FACTS if f"{{{name}}}" in TEMPLATES[field][0]}
    return {name: fact for name, fact in facts.items() if name in names}


def known_fields(facts: Mapping[str, str]) -> tuple[str, ...]:
    """Return the fields of which every fact is known."""
    return tuple(field for field, templates in TEMPLATES.items() if set(NAME.findall(templates[0])) <= set(facts))


def render(rng: np.random.Generator | None, facts: Mapping[str, str], without: Sequence[str] = ()) -> str:
    """Write a record in words.

    Args:
        rng: Draws a template for every field; None takes the first of each: the record as it is stored.
        facts: Such as {"age": "61", "sex": "woman"}; fields with unknown facts are left out.
        without: Fields to leave out.

    Raises:
        InputError: Nothing is left to say, or a fact holds the punctuation that ends a fact.
    """
    fields = [field for field in known_fields(facts) if field not in without]
    if not fields:
        raise InputError("record", f"facts of one of {listed(TEMPLATES)}", listed(facts) or "none")
    for name, fact in facts.items():
        if not re.fullmatch(FACT, fact):
            raise InputError(f"record '{name}'", "a fact without . ; , and :", f"'{fact}'")
    chosen = (TEMPLATES[field][0 if rng is None else rng.integers(len(TEMPLATES[field]))] for field in fields)
    return " ".join(template.format(**facts) for template in chosen)


def parse(text: str) -> dict[str, str]:
    """Read the facts of a record that `render` wrote."""
    facts: dict[str, str] = {}
    for templates in TEMPLATES.values():
        for template in templates:
            if found := re.search(_pattern(template), text):
                facts |= found.groupdict()
                break
    return facts


def question(rng: np.random.Generator | None, original: str, options: str) -> str:
    """Ask the same in other words; the horizon is kept and the block of options byte for byte.

    A question about the present, which names no horizon, keeps its words and gets others before them.

    Args:
        rng: Draws the paraphrase; None keeps the question as it is.
        original: May have a horizon in years, of several the last.
        options: Its block of options.
    """
    if rng is None:
        return f"{original}\n{options}"
    years = horizon(original)
    words = LEADS if years is None else QUESTIONS
    return f"{words[rng.integers(len(words))].format(question=original, years=years)}\n{options}"


def horizon(text: str) -> str | None:
    """Return the last number of years that a text names; None where it names none."""
    found = HORIZON.findall(text)
    return found[-1] if found else None


def _pattern(template: str) -> str:
    parts = NAME.split(template)
    # A record may begin with the sentence or have others before it; "Pulse: 60" is no part of a longer word.
    words = [re.escape(part) if place % 2 == 0 else f"(?P<{part}>{FACT})" for place, part in enumerate(parts)]
    return r"(?:^|(?<=\. ))" + "".join(words)
