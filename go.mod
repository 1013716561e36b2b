module dialstatus

go 1.24.2

require (
	github.com/go-martini/martini v0.0.0-20170121215854-22fa46961aab
	github.com/plivo/plivo-go/v7 v7.60.2
)

require (
	github.com/codegangsta/inject v0.0.0-20150114235600-33e0aa1cb7c0 // indirect
	golang.org/x/text v0.11.0 // indirect
)
