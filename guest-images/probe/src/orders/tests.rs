use super::*;
use proptest::prelude::*;

fn only(text: &str) -> Order {
    let orders = parse(text).unwrap();
    assert_eq!(orders.len(), 1);
    orders[0].clone()
}

fn problem(text: &str) -> Problem {
    parse(text).unwrap_err().problem
}

#[test]
fn a_sequence_keeps_its_order_and_arguments() {
    let orders = parse("dhcp;ping=gw,count=3,ttl=1,expect=time-exceeded;;wait=10").unwrap();
    assert_eq!(orders.iter().map(|order| order.verb).collect::<Vec<_>>(), ["dhcp", "ping", "wait"]);
    assert_eq!(orders[1].target, "gw");
    assert_eq!((orders[1].number("count", 1), orders[1].number("size", 56)), (3, 56));
    assert_eq!(orders[1].text("expect"), Some("time-exceeded"));
}

#[test]
fn escapes_reach_targets_and_values() {
    let order = only("tcp-get=h:80/a%2cb%3Bc,want.reason=%25");
    assert_eq!(order.target, "h:80/a,b;c");
    assert_eq!(order.wants().collect::<Vec<_>>(), [("reason", "%")]);
}

#[test]
fn what_is_not_in_the_language_is_named() {
    assert_eq!(problem("pong=gw"), Problem::Verb("pong".into()));
    assert_eq!(problem("ping"), Problem::NoTarget);
    assert_eq!(problem("dhcp=yes"), Problem::Target("yes".into()));
    assert_eq!(problem("ping=gw,cuont=3"), Problem::Key("cuont".into()));
    assert_eq!(problem("ping=gw,count"), Problem::Word("count".into()));
    assert_eq!(problem("ping=gw,count=-1"), Problem::Number("-1".into()));
    assert_eq!(problem("wait=soon"), Problem::Number("soon".into()));
    assert_eq!(problem("resolve=a%2"), Problem::Escape("a%2".into()));
    assert_eq!(problem("resolve=a%ff"), Problem::Escape("a%ff".into()));
}

#[test]
fn a_bad_order_anywhere_refuses_all() {
    assert_eq!(parse("dhcp;ping=gw;tcp-echo").unwrap_err().order, "tcp-echo");
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in "\\PC{0,200}") {
        let _ = parse(&text);
    }

    #[test]
    fn any_target_survives_escaping(target in "\\PC{1,40}") {
        let escaped: String = target.bytes().map(|byte| format!("%{byte:02x}")).collect();
        prop_assert_eq!(only(&format!("resolve={escaped}")).target, target);
    }
}
