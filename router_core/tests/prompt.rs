//! Reading prompts: spellings that mean the same give the same keys, turns extend each other, and no body does harm.

mod spelling;

use proptest::prelude::*;
use router_core::prompt::{BadRequest, Endpoint, Prompt, PromptReader};
use serde_json::{Map, Value, json};
use spelling::{Spelling, spell};

const ENDPOINTS: [Endpoint; 3] = [Endpoint::Chat, Endpoint::Completions, Endpoint::Generate];

fn read(endpoint: Endpoint, body: &[u8]) -> Result<Prompt, BadRequest> {
    PromptReader::new(7).read(endpoint, body)
}

fn chat(body: &Value) -> Prompt {
    read(Endpoint::Chat, body.to_string().as_bytes()).expect("a valid chat")
}

fn keys(prompt: &Prompt) -> Vec<u64> {
    prompt.blocks.iter().map(|block| block.key).collect()
}

fn message(role: &str, content: impl Into<Value>) -> Value {
    json!({"role": role, "content": content.into()})
}

fn user_says(text: &str) -> Value {
    json!({"messages": [message("user", text)]})
}

// ------------------------------------------------------------------------------------------------------------- generators

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z \\n\"\\\\/]{0,40}",
        "\\PC{0,60}",
        "[a-z ]{100,700}",
        "[\u{4e00}-\u{4fff}\u{1f600}-\u{1f64f}]{0,200}",
    ]
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i32>().prop_map(|quarters| Value::from(f64::from(quarters) / 4.0)),
        text().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec(("[a-z_]{1,8}", inner), 0..4)
                .prop_map(|fields| Value::Object(fields.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

fn part() -> impl Strategy<Value = Value> {
    prop_oneof![
        3 => text().prop_map(|text| json!({"type": "text", "text": text})),
        1 => text().prop_map(|url| json!({"type": "image_url", "image_url": {"url": url, "detail": "high"}})),
        1 => text().prop_map(|data| json!({"type": "input_audio", "input_audio": {"data": data}})),
    ]
}

fn any_message() -> impl Strategy<Value = Value> {
    let role = prop_oneof![Just("system"), Just("user"), Just("assistant"), Just("tool"), Just("developer")];
    let content = prop_oneof![
        4 => text().prop_map(Value::from),
        1 => prop::collection::vec(part(), 0..4).prop_map(Value::from),
        1 => Just(Value::Null),
    ];
    let calls = prop::option::weighted(0.2, prop::collection::vec(any_json(), 1..3));
    (role, content, calls, prop::option::weighted(0.2, "[a-z]{1,9}")).prop_map(|(role, content, calls, name)| {
        let mut message = message(role, content);
        if let Some(calls) = calls {
            message["tool_calls"] = calls.into();
        }
        if let Some(name) = name {
            message["name"] = name.into();
        }
        message
    })
}

prop_compose! {
    fn any_chat()(
        messages in prop::collection::vec(any_message(), 1..6),
        tools in prop::option::weighted(0.4, prop::collection::vec(any_json(), 0..3)),
        model in prop::option::of("[a-z:/]{1,12}"),
        salt in prop::option::weighted(0.2, text()),
        stream in prop::option::of(any::<bool>()),
        unknown in any_json(),
    ) -> Value {
        let mut body = json!({"messages": messages, "unknown": unknown, "temperature": 0.5});
        let fields = [
            ("tools", tools.map(Value::from)), ("model", model.map(Value::from)),
            ("cache_salt", salt.map(Value::from)), ("stream", stream.map(Value::from)),
        ];
        for (name, value) in fields {
            if let Some(value) = value {
                body[name] = value;
            }
        }
        body
    }
}

// ------------------------------------------------------------------------------------------------------------- properties

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn spelling_does_not_matter(body in any_chat(), seed in any::<u64>()) {
        let plain = chat(&body);
        let respelled = spell(&body, &mut Spelling::new(seed));
        prop_assert_eq!(&serde_json::from_str::<Value>(&respelled).expect("still JSON"), &body);
        let read = read(Endpoint::Chat, respelled.as_bytes()).expect("still a chat");
        let (offset, _) = read.rank_place.splice(0);
        let before = offset.checked_sub(1).map(|before| respelled.as_bytes()[before]);
        prop_assert_eq!(before, Some(b'{'), "{:?}", read.rank_place);
        prop_assert_eq!(Prompt { rank_place: plain.rank_place, ..read }, plain);
    }

    #[test]
    fn the_fields_are_those_that_serde_json_sees(body in any_chat()) {
        let prompt = chat(&body);
        prop_assert_eq!(prompt.model.as_deref(), body["model"].as_str());
        prop_assert_eq!(prompt.stream, body["stream"].as_bool().unwrap_or(false));
        prop_assert_eq!(prompt.prompt_bytes, u64::from(prompt.routed_bytes));
        prop_assert_eq!(prompt.blocks.last().map_or(0, |block| block.end), prompt.routed_bytes);
        prop_assert!(prompt.blocks.is_sorted_by_key(|block| block.end));
        prop_assert!(prompt.blocks.iter().all(|block| block.end <= block.credit && block.credit <= prompt.routed_bytes));
    }

    #[test]
    fn a_turn_extends_the_turn_before(body in any_chat(), answer in text(), next in text()) {
        let before = chat(&body);
        let mut longer = body.clone();
        let messages = longer["messages"].as_array_mut().expect("a list");
        messages.push(message("assistant", answer.as_str()));
        messages.push(message("user", next.as_str()));
        let after = chat(&longer);
        let known = before.blocks.len();
        prop_assert_eq!(&keys(&before)[..], &keys(&after)[..known]);
        // Whoever holds the turn before holds the answer to it.
        let held = after.blocks[known - 1];
        prop_assert_eq!(held.end, before.routed_bytes);
        prop_assert_eq!(held.credit, before.routed_bytes + answer.len() as u32);
    }

    #[test]
    fn blocks_of_texts_are_equal_up_to_where_the_texts_part(
        common in "[a-z]{0,3000}", left in "[a-z]{0,500}", right in "[a-z]{0,500}",
    ) {
        let [left, right] = [left, right].map(|rest| format!("{common}{rest}"));
        let shared = left.bytes().zip(right.bytes()).take_while(|(left, right)| left == right).count();
        let [a, b] = [&left, &right].map(|text| {
            read(Endpoint::Completions, json!({"prompt": text}).to_string().as_bytes()).expect("a prompt")
        });
        for (block, other) in a.blocks.iter().zip(&b.blocks) {
            let same_text = block.end == other.end && block.end as usize <= shared;
            prop_assert_eq!(block.key == other.key, same_text, "at {} of {}", block.end, shared);
        }
    }

    #[test]
    fn whatever_comes_is_read_as_serde_json_reads_it(
        body in any_chat(), seed in any::<u64>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3u8), 1..4),
    ) {
        let mut bytes = spell(&body, &mut Spelling::new(seed)).into_bytes();
        for (place, byte, edit) in edits {
            let place = place.index(bytes.len().max(1));
            match edit {
                0 if place < bytes.len() => bytes[place] = byte,
                1 if place < bytes.len() => { bytes.remove(place); }
                _ => bytes.truncate(place),
            }
        }
        agrees_with_serde_json(&bytes)?;
    }

    #[test]
    fn noise_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        agrees_with_serde_json(&bytes)?;
    }

    #[test]
    fn brackets_and_quotes_are_read_as_serde_json_reads_them(text in "[\\[\\]{}:,\"\\\\ud8009e.-]{0,40}") {
        agrees_with_serde_json(format!("{{\"messages\":[],\"x\":{text}}}").as_bytes())?;
        agrees_with_serde_json(text.as_bytes())?;
    }
}

/// Refuses as malformed (without naming a field) what serde_json refuses, and only that.
fn agrees_with_serde_json(bytes: &[u8]) -> Result<(), TestCaseError> {
    let theirs = serde_json::from_slice::<Value>(bytes);
    for endpoint in ENDPOINTS {
        let malformed = matches!(read(endpoint, bytes), Err(BadRequest { param: None, .. }));
        let wanted = match &theirs {
            Ok(value) => !value.is_object(),
            // Lone surrogates are read, on purpose.
            Err(error) if error.to_string().contains("surrogate") || error.to_string().contains("end of hex") => {
                continue;
            }
            Err(_) => true,
        };
        prop_assert_eq!(malformed, wanted, "{:?} of {}", theirs, String::from_utf8_lossy(bytes));
    }
    Ok(())
}

// ----------------------------------------------------------------------------------------------------------------- tables

#[test]
fn what_changes_the_prompt_changes_its_keys() {
    let base = json!({"model": "m", "messages": [message("system", "a"), message("user", "b")]});
    let with = |name: &str, value: Value| {
        let mut body = base.clone();
        body[name] = value;
        body
    };
    let messages = |messages: Value| with("messages", messages);
    let bodies = [
        base.clone(),
        with("model", "n".into()),
        with("tools", json!([{"name": "f"}])),
        with("tools", json!([{"name": "g"}])),
        with("cache_salt", "s".into()),
        with("extra_key", "s".into()),
        with("lora_path", "s".into()),
        messages(json!([message("system", "ab"), message("user", "")])),
        messages(json!([message("user", "a"), message("user", "b")])),
        messages(json!([message("system", "a"), message("assistant", "b")])),
        messages(json!([message("system", "a"), message("critic", "b")])),
        messages(json!([message("system", "a"), {"role": "user", "content": "b", "name": "n"}])),
        messages(json!([message("system", "a"), {"role": "user", "content": "b", "tool_calls": [{"id": "1"}]}])),
        messages(json!([
            message("system", "a"),
            message("user", json!([{"type": "text", "text": "b"}, {"type": "text", "text": ""}]))
        ])),
        messages(json!([
            message("system", "a"),
            message("user", json!([{"type": "image_url", "image_url": {"url": "b"}}]))
        ])),
        messages(json!([
            message("system", "a"),
            message("user", json!([{"type": "image_url", "image_url": {"url": "c"}}]))
        ])),
        messages(json!([
            message("system", "a"),
            message("user", json!([{"type": "video_url", "video_url": {"url": "c"}}]))
        ])),
    ];
    let mut last: Vec<_> = bodies.iter().map(|body| chat(body).blocks.last().expect("text").key).collect();
    last.sort_unstable();
    last.dedup();
    assert_eq!(last.len(), bodies.len());
}

#[test]
fn what_does_not_change_the_prompt_does_not_change_its_keys() {
    let base = chat(&json!({"model": "m", "messages": [message("user", "é")]}));
    let bodies = [
        r#"{"model":"m","messages":[{"role":"user","content":"\u00e9"}]}"#,
        r#"{"messages":[{"content":"é","role":"user"}],"model":"m"}"#,
        r#"{"messages":[{"content":[{"text":"é","type":"text"}],"role":"user"}],"model":"m"}"#,
        r#"{"messages":[{"content":["é"],"role":"user","tool_calls":[],"name":null}],"model":"m","tools":null}"#,
        r#"{"messages":7,"model":5,"model":"m","messages":[{"role":8,"content":"x","content":"é","role":"user"}]}"#,
        r#"{"messages":[{"role":"user","content":[{"text":"x","type":"text","text":"é","cache_control":{"a":1}}]}],"model":"m"}"#,
    ];
    for body in bodies {
        let prompt = read(Endpoint::Chat, body.as_bytes()).expect(body);
        assert_eq!(keys(&prompt), keys(&base), "{body}");
    }
}

#[test]
fn a_body_that_no_worker_takes_is_refused() {
    use Endpoint::{Chat, Completions, Generate};
    let good = r#"[{"role":"user","content":"x"}]"#;
    let cases: &[(Endpoint, String, Option<&str>)] = &[
        (Chat, String::new(), None),
        (Chat, "[]".into(), None),
        (Chat, "null".into(), None),
        (Chat, "{".into(), None),
        (Chat, r#"{"messages":[{"role":"user","content":"x"#.into(), None),
        (Chat, format!(r#"{{"messages":{good}}} x"#), None),
        (Chat, "{}".into(), Some("messages")),
        (Chat, r#"{"messages":null}"#.into(), Some("messages")),
        (Chat, r#"{"messages":"x"}"#.into(), Some("messages")),
        (Chat, r#"{"messages":[]}"#.into(), Some("messages")),
        (Chat, r#"{"messages":["x"]}"#.into(), Some("messages")),
        (Chat, r#"{"messages":[{"content":"x"}]}"#.into(), Some("messages")),
        (Chat, r#"{"messages":[{"role":"user","content":5}]}"#.into(), Some("messages")),
        (Chat, r#"{"messages":[{"role":"user","content":[5]}]}"#.into(), Some("messages")),
        (Chat, format!(r#"{{"messages":{good},"model":5}}"#), Some("model")),
        (Chat, format!(r#"{{"messages":{good},"stream":"yes"}}"#), Some("stream")),
        (Chat, format!(r#"{{"messages":{good},"data_parallel_rank":-1}}"#), Some("data_parallel_rank")),
        (Completions, "{}".into(), Some("prompt")),
        (Completions, r#"{"prompt":[]}"#.into(), Some("prompt")),
        (Completions, r#"{"prompt":5}"#.into(), Some("prompt")),
        (Completions, r#"{"prompt":[1,"x"]}"#.into(), Some("prompt")),
        (Completions, r#"{"prompt":["x",1]}"#.into(), Some("prompt")),
        (Completions, r#"{"prompt":[[1],["x"]]}"#.into(), Some("prompt")),
        (Completions, r#"{"prompt":[1,-1]}"#.into(), Some("prompt")),
        (Completions, r#"{"prompt":[4294967296]}"#.into(), Some("prompt")),
        (Generate, "{}".into(), Some("text")),
        (Generate, r#"{"input_ids":"x","input_ids":[1.5]}"#.into(), Some("input_ids")),
        (Generate, r#"{"input_ids":[1,"x"]}"#.into(), Some("input_ids")),
        (Generate, r#"{"input_ids":[1,null]}"#.into(), Some("input_ids")),
        (Generate, r#"{"input_ids":[1,-2]}"#.into(), Some("input_ids")),
        (Generate, r#"{"input_ids":[1,2.5]}"#.into(), Some("input_ids")),
        (Generate, r#"{"input_ids":[1,[2]]}"#.into(), Some("input_ids")),
        (Generate, r#"{"input_ids":[[1,{}]]}"#.into(), Some("input_ids")),
        (Generate, r#"{"input_ids":[[1],[2,true]]}"#.into(), Some("input_ids")),
        (Generate, r#"{"input_ids":[1,4294967296]}"#.into(), Some("input_ids")),
        (Completions, r#"{"prompt":[1,"x"]}"#.into(), Some("prompt")),
    ];
    for (endpoint, body, param) in cases {
        let refusal = read(*endpoint, body.as_bytes()).expect_err(body);
        assert_eq!(refusal.param, *param, "{body}: {refusal}");
        assert!(!refusal.message.contains('\n'), "{refusal}");
    }
    assert_eq!(read(Chat, b"{\"messages\":\"\xff\"}").expect_err("UTF-8").message, "The body is not valid UTF-8.");
}

#[test]
fn what_a_worker_may_take_is_passed_on() {
    let good = r#""messages":[{"role":"user","content":"x"}]"#;
    let bodies = [
        format!(r#"{{{good},"stream":null,"model":null}}"#),
        format!(r#"{{{good},"stream":1}}"#),
        format!(r#"{{{good},"unknown":{{"deep":[[[{{}}]]]}},"n":123456789012345678901234567890}}"#),
        format!(" \n{{{good}}}\r\n\t"),
        r#"{"messages":[{"role":"user","content":"\ud800 and \udc00"}]}"#.into(),
        r#"{"messages":[{"role":"assistant"},{"role":"","content":""}]}"#.into(),
    ];
    for body in bodies {
        read(Endpoint::Chat, body.as_bytes()).expect(&body);
    }
    assert!(read(Endpoint::Generate, br#"{"input_embeds":[[0.5]]}"#).expect("embeddings").blocks.is_empty());
    assert!(read(Endpoint::Completions, br#"{"prompt":""}"#).expect("nothing").blocks.is_empty());
}

#[test]
fn a_batch_is_routed_by_its_first_prompt() {
    let read = |endpoint, body: &str| read(endpoint, body.as_bytes()).expect(body);
    let one = read(Endpoint::Completions, r#"{"prompt":"first"}"#);
    let many = read(Endpoint::Completions, r#"{"prompt":["first","second",""]}"#);
    assert_eq!((many.batch, many.prompt_bytes, many.routed_bytes), (3, 11, 5));
    assert_eq!(keys(&one), keys(&many));
    let ids = read(Endpoint::Generate, r#"{"input_ids":[1,2,3],"cache_salt":"s"}"#);
    let lists = read(Endpoint::Generate, r#"{"input_ids":[[1,2,3],[4],[]],"cache_salt":["s","t","u"]}"#);
    assert_eq!((ids.batch, ids.prompt_bytes), (1, 12));
    assert_eq!((lists.batch, lists.prompt_bytes, lists.routed_bytes), (3, 16, 12));
    assert_eq!(keys(&ids), keys(&lists));
}

#[test]
fn kinds_of_prompt_never_match() {
    // "abcd" and the id whose bytes read "abcd".
    let text = read(Endpoint::Completions, br#"{"prompt":"abcd"}"#).expect("text");
    let ids = read(Endpoint::Completions, br#"{"prompt":[1684234849]}"#).expect("ids");
    let other = read(Endpoint::Generate, br#"{"text":"abcd"}"#).expect("text");
    assert_eq!((text.prompt_bytes, ids.prompt_bytes), (4, 4));
    assert_ne!(keys(&text), keys(&ids));
    assert_eq!(keys(&text), keys(&other));
    assert_ne!(keys(&text), keys(&chat(&user_says("abcd"))));
}

#[test]
fn seeds_give_other_keys() {
    let body = user_says("x").to_string();
    let read = |seed| PromptReader::new(seed).read(Endpoint::Chat, body.as_bytes()).expect("a chat");
    assert_ne!(keys(&read(1)), keys(&read(2)));
}

#[test]
fn a_request_has_a_name_and_a_priority_for_its_worker() {
    let read = |fields: &str| {
        let body = format!(r#"{{"text":"x"{fields}}}"#);
        let prompt = read(Endpoint::Generate, body.as_bytes()).expect("a prompt");
        (prompt.rid, prompt.priority)
    };
    let rid = |text: &str| Some(text.to_owned());
    assert_eq!(read(""), (None, None));
    assert_eq!(read(r#","rid":"a","priority":3,"rid":"b""#), (rid("b"), Some(3)));
    assert_eq!(read(r#","rid":["c","d"],"priority":-2"#), (rid("c"), Some(-2)));
    assert_eq!(read(r#","rid":{},"priority":1.5"#), (None, None));
}

#[test]
fn a_block_ends_where_the_instructions_end() {
    let chat = |system: &str, question: &str| {
        let messages = [json!({"role": "system", "content": system}), json!({"role": "user", "content": question})];
        let body = json!({"messages": messages}).to_string();
        read(Endpoint::Chat, body.as_bytes()).expect("a chat")
    };
    for length in [5, 200, 1_000, 6_000] {
        let system = "be brief ".repeat(length / 9 + 1);
        let (one, other) = (chat(&system, "why?"), chat(&system, "how?"));
        let shared = one.blocks.iter().zip(&other.blocks).take_while(|(one, other)| one.key == other.key).last();
        assert_eq!(shared.map(|(block, _)| block.end as usize), Some(system.len()));
    }
}

#[test]
fn what_is_spliced_in_holds() {
    // What the client says of a rank, what of it counts, and what the body begins with once the router has chosen rank 3.
    let table = [
        ("", None, " {\"data_parallel_rank\":3,\"messages\""),
        (",\"data_parallel_rank\":null", None, " {\"messages\""),
        (",\"routed_dp_rank\":null", None, " {\"messages\""),
        (",\"data_\\u0070arallel_rank\":null", None, " {\"messages\""),
        (",\"data_parallel_rank\":0", Some(0), " {\"messages\""),
        (",\"routed_dp_rank\":1,\"data_parallel_rank\":null", Some(1), " {\"messages\""),
        (",\"nested\":{\"data_parallel_rank\":1}", None, " {\"data_parallel_rank\":3,\"messages\""),
    ];
    for (field, pinned, begin) in table {
        let body = format!(" {{\"messages\":[{{\"role\":\"user\",\"content\":\"x\"}}]{field}}} \n").into_bytes();
        let prompt = read(Endpoint::Chat, &body).expect("a chat");
        assert_eq!(prompt.pinned_rank, pinned, "{field}");
        let mut spliced = body.clone();
        let (offset, inserted) = prompt.rank_place.splice(3);
        spliced.splice(offset..offset, inserted);
        assert!(spliced.starts_with(begin.as_bytes()), "{}", spliced.escape_ascii());
        let value: Value = serde_json::from_slice(&spliced).expect("still JSON");
        assert_eq!(value["data_parallel_rank"], 3, "{field}");
        assert_eq!(read(Endpoint::Chat, &spliced).expect("still a chat").blocks, prompt.blocks);
    }
}

// ---------------------------------------------------------------------------------------------------------------- hostile

#[test]
fn deep_nesting_is_refused_wherever_it_stands() {
    let places = [
        r#"{"x":@}"#,
        r#"{"tools":@}"#,
        r#"{"messages":@}"#,
        r#"{"model":@}"#,
        r#"{"prompt":@}"#,
        r#"{"input_ids":@}"#,
        r#"{"messages":[{"role":"user","content":@}]}"#,
        r#"{"messages":[{"role":"user","content":[{"image_url":@}]}]}"#,
        r#"{"messages":[{"role":"user","tool_calls":@}]}"#,
    ];
    let nested = |open: &str, close: &str, depth| format!("{}{}{}", open.repeat(depth), "1", close.repeat(depth));
    for place in places {
        for (open, close) in [("[", "]"), (r#"{"a":"#, "}"), ("[", ""), (r#"{"a":["#, "")] {
            let body = place.replace('@', &nested(open, close, 100_000));
            for endpoint in ENDPOINTS {
                let refusal = read(endpoint, body.as_bytes()).expect_err("too deep");
                assert_eq!(refusal.param, None, "{place} {open}: {refusal}");
            }
        }
        let fine = r#"{"messages":[{"role":"user","content":"x"}],"x":@}"#.replace('@', &nested("[", "]", 60));
        read(Endpoint::Chat, fine.as_bytes()).expect("60 levels");
    }
}

#[test]
fn a_large_body_is_read_like_a_small_one() {
    let filler = "x".repeat(300 << 10);
    let large =
        |rest: &str| format!(r#"{{"filler":"{filler}","messages":[{{"role":"user","content":"hi \ud800"}}]{rest}"#);
    let good = read(Endpoint::Chat, large("}").as_bytes()).expect("a chat");
    let small = large("}").replace(&filler, "");
    assert_eq!(keys(&good), keys(&read(Endpoint::Chat, small.as_bytes()).expect("a chat")));
    for rest in ["", ",}", r#","x":[1,]}"#, r#","x":"\q"}"#, r#","x":"\u12"}"#, "} x", r#","x":tru}"#] {
        assert_eq!(read(Endpoint::Chat, large(rest).as_bytes()).expect_err(rest).param, None);
    }
    let deep = format!(r#","x":{}{}}}"#, "[".repeat(100), "]".repeat(100));
    let refusal = read(Endpoint::Chat, large(&deep).as_bytes()).expect_err("too deep");
    assert_eq!(refusal.message, "The body is not valid JSON: more than 64 levels of nesting");
}

/// Work done for a body is a constant times its length: what is kept of it never is more than a constant times its length, also
/// where a body repeats what could pile up. (That no step is done per pair of things is what the sizes below would show: at
/// these sizes a step per pair takes minutes, and tests have a time-out.)
#[test]
fn repetition_does_not_pile_up() {
    let many = 200_000;
    let part_keys: String = (0..many).map(|i| format!(r#""k{i}":0,"#)).collect();
    let bodies = [
        format!(
            r#"{{{}"messages":[{{"role":"user","content":"x"}}]}}"#,
            r#""messages":[{"role":"user","content":"y"}],"#.repeat(many)
        ),
        format!(r#"{{"messages":[{{{}"role":"user"}}]}}"#, r#""content":"abc","#.repeat(many)),
        format!(r#"{{"messages":[{{"role":"user","content":[{{{part_keys}"text":"x"}}]}}]}}"#),
        format!(r#"{{"messages":[{{"role":"user","content":[{}"x"]}}]}}"#, r#"{"text":"a"},"#.repeat(many)),
        format!(
            r#"{{"messages":[{}{{"role":"user","content":"x"}}]}}"#,
            r#"{"role":"assistant","content":"a"},"#.repeat(many)
        ),
        format!(r#"{{"messages":[{{"role":"user","content":"{}"}}]}}"#, r"\u00e9\ud83d".repeat(many)),
        format!(r#"{{"messages":[{{"role":"user","content":"x"}}],"{}":0}}"#, "k".repeat(many)),
    ];
    for body in bodies {
        let prompt = read(Endpoint::Chat, body.as_bytes()).expect("a chat");
        assert!(prompt.blocks.len() <= 4096, "{}", prompt.blocks.len());
        assert!(prompt.prompt_bytes <= 3 * body.len() as u64);
    }
}
